"""Measures of safety and usefulness: refusals, margins, task loss."""
