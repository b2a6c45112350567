"""Helpers of the six slots of `Attention`; mechanisms plug in through `base.Slot`."""
