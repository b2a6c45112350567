"""Dimensions, dtypes, configs, errors and discovery: imports no other room."""
