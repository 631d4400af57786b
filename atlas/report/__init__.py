"""What eval.py calls: tables, figures, masks, videos; and the benchmark of speed."""
