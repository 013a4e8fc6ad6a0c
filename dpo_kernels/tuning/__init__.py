"""dpo-kernels tune: each family of kernels proven and timed on this machine's own device."""
