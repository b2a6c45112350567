"""Measurements that stand in the README: kernels, mixers, whole training steps."""
