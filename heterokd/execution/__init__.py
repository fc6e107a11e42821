"""Run searches and trainings on Ray."""
