"""Hyper-parameter search: what varies (space), one trial, the study on disk, and the search that drives them."""
