"""The seven benchmarks of LLaVA-1.5: questions, answers, scores, files for submission."""
