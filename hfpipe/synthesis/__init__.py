"""Rows that models make: a teacher answers or asks, what can be checked is checked, and every row says how it came to be."""
