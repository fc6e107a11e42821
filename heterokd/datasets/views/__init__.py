"""Views: seeded, reproducible augmentation. A view is a pure function of (policy, seed, image index, view number).

No state is stored: the draws of a view come from a counter-based generator with (index, view) as its counter, and
policy and seed as its key. So a view is the same in any order, batch and process, and for any number of workers. If two
images are mixed, the partner is drawn in the same way from the images of the training split, as a part of the view.

The draws are the same on every machine. On the same CPU the pixels are bitwise equal for any composition of the batch;
between devices they differ by float rounding.
"""
