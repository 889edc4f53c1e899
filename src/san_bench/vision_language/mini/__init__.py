"""mini-vl: seven forms of question about small drawn pictures."""
