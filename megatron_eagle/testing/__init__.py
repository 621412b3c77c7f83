"""The gloo harness that starts a test on several ranks."""
