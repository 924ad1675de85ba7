"""Attacker-defender games for robust machine learning: the mathematics.

Environments are in the sibling package ``envs``, learners in ``agents``.
"""
