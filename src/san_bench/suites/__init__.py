"""Many runs: suites, the engines that carry them out, and the demo."""
