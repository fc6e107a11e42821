"""Read images, label maps and tables; make batches for training and evaluation."""
