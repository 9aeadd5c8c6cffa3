from mtllm_fast.ops.distillation_loss.api import DistillationLoss, distillation_loss

__all__ = ["DistillationLoss", "distillation_loss"]
