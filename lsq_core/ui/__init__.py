"""What the pages share: their frame, what was chosen, what is known, and running jobs.

The only part of the library that knows Streamlit; it imports no torch.
"""
