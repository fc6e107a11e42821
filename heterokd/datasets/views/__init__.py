"""Views: seeded, replayable augmentation. A view is a pure function of (policy, seed, image index, view number).

Nothing is stored and no generator is carried along: the draws of a view come from a counter-based generator, whose
counter is (index, view) and whose key is the policy and the seed. So a view is the same in any order, batch and
process, and for any number of workers. Where two images are mixed, the partner is drawn in the same way, from the
images of the training split: it is a part of the view.

The draws are the same on every machine. The pixels are, on one CPU, the same to the last bit whatever else is in the
batch; between devices they differ by float rounding.
"""
