"""Critic and Judge: pictures of regions to prose, prose to a yes or no per region (LVLM-VA §4.2).

Nothing here imports torch.
"""
