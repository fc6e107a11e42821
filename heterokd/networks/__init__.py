"""Networks that give `Outputs`: any classifier, and segmentation networks of segmentation_models_pytorch (smp).

`network` builds networks by name. Classifiers: `bodies` builds timm's module, `architectures` adds networks that timm
lacks, `modules` builds torchvision's and users' modules. `splits` finds the stages of common structures, which `parts`
describes and `classifier` runs; others run as they are: `dataflow` records their forward, `points` chooses their
stages, `entry` runs them from a stage on, `taps` describes and `tapped` runs them. `tail` runs both from a stage on.
`families` lists a small network of each of timm's modules. Segmentation: `segmentation_names` parses names,
`segmentation_bodies` builds smp's module, `segmentation` runs it. `weights` saves and loads weights, `student_costs`
measures networks, `onnx_graph` writes, quantizes and times their ONNX graphs.
"""
