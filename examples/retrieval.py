"""Cross-lingual retrieval with the published checkpoint, as its users write it. New: ``import mtllm_fast``.

python examples/retrieval.py [CHECKPOINT]
"""

import sys

import torch
import torch.nn.functional as F
from transformers import AutoModel

import mtllm_fast  # noqa: F401  (AutoModel now finds the model's class; no remote code runs)

checkpoint = (
    sys.argv[1] if len(sys.argv) > 1 else "fdschmidt93/NLLB-LLM2Vec-Meta-Llama-31-8B-Instruct-mntp-unsup-simcse"
)
model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True, torch_dtype=torch.bfloat16).eval()

documents = ["The cat sits on the mat.", "It will rain tomorrow.", "She bought bread at the market."]
queries = ["Die Katze sitzt auf der Matte.", "Morgen wird es regnen.", "Sie kaufte Brot auf dem Markt."]
document_embeddings = model.encode(documents, src_lang="eng_Latn")
query_embeddings = model.encode(queries, src_lang="deu_Latn")

scores = F.normalize(query_embeddings.float(), dim=-1) @ F.normalize(document_embeddings.float(), dim=-1).T
for query, row in zip(queries, scores, strict=True):
    print(f"{row.max():.3f}  {query}  ->  {documents[row.argmax()]}")
