"""What a person sees: progress, summary, report and charts."""
