"""Backends of video sparse attention: plain functions over contiguous tensors, no autograd.

A backend is a module with the functions of ``reference``; what it lacks the reference does. All
arguments were checked by the caller; outputs are fresh tensors.
"""
