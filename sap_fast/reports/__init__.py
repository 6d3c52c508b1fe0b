"""Pages and pictures: the report of a comparison, and the safety landscape of a model."""
