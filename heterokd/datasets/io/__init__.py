"""Read images, label maps and tables; batches for training and evaluation."""
