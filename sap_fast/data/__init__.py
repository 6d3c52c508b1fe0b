"""Reading, checking and encoding of task and safety data."""
