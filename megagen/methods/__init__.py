"""Training methods: pure algorithms over roles, one file each. They know no parallel layout."""

METHODS: dict[str, str] = {
    "consistency": "megagen.methods.consistency:ConsistencyMethod",
    "consistency_causal": "megagen.methods.consistency_causal:ConsistencyCausalMethod",
    "diffusion_forcing": "megagen.methods.diffusion_forcing:DiffusionForcingSFTMethod",
    "dmd2": "megagen.methods.dmd2:DMD2Method",
    "finetune": "megagen.methods.finetune:FineTuneMethod",
    "kd": "megagen.methods.kd:KDMethod",
    "kd_causal": "megagen.methods.kd_causal:KDCausalMethod",
    "self_forcing": "megagen.methods.self_forcing:SelfForcingMethod",
    "teacher_forcing": "megagen.methods.teacher_forcing:TeacherForcingSFTMethod",
}
"""Short names that ``method._target_`` takes besides dotted paths."""
