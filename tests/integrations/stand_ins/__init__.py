"""Small modules in the place of stacks that are not installed, with the interface they publish."""
