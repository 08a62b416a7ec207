"""Training problems: reading and checking them, their order, curricula.

A resumed run must see the problems in the order of an uninterrupted one.
"""
