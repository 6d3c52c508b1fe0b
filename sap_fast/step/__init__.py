"""One step: the passes, and what they find. Nothing here knows an optimizer."""
