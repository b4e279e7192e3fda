"""Triton kernels and their launchers. They need torch and triton only: qscope imports them, never the reverse."""
