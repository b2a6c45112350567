"""The chunked linear family: one flagged recurrence, its forms and their choice.

Start at `linear_attention` (dispatch.py); what it computes is a `LinearSpec`.
"""
