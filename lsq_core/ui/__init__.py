"""Code shared by the pages: page frame, session state, cached reads and running jobs.

This is the only part of the library that uses Streamlit; it does not import torch.
"""
