"""Adapters to training stacks."""
