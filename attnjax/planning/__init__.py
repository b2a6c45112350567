"""Deviceless compilation, memory, roofline: what a config needs before it is run.

Start at `planner.plan`; `targets` says what can be asked for and `chips` where its
numbers come from.
"""
