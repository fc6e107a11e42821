"""Networks that give `Outputs`: any timm classifier, and segmentation networks of segmentation_models_pytorch (smp).

`network` builds networks by name. Classifiers: `bodies` builds timm's module, `architectures` adds networks that timm
lacks, `splits` finds the stages by structure, `parts` describes them, `classifier` runs them. Segmentation:
`segmentation_names` parses names, `segmentation_bodies` builds smp's module, `segmentation` runs it. `weights` saves
and loads weights, `student_costs` measures networks.
"""
