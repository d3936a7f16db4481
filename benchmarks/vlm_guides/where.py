"""How much of several kinds of relevance lies in the region of the question: python where.py SEED"""

import sys, PIL.Image, torch
from torch import nn
from small import *
from transformers import LlavaForConditionalGeneration
from modeling_trips.hosts.vlm.supervision import *

torch.set_num_threads(1)
seed = int(sys.argv[1])
model = LlavaForConditionalGeneration.from_pretrained(f"starts/{seed}/llava").eval().requires_grad_(False)
rows = []
for number in range(40):
    scene = draw_scene("validation", number, seed)
    rows += [(pixels_of(scene.image), q) for q in scene.questions if q.kind != "place" and q.region]
pixels = torch.stack([p for p, _ in rows])
prompts = [encode(q.text) for _, q in rows]
answers = torch.tensor([encode(q.answer)[0] for _, q in rows])
inputs = llava_inputs(pixels, [[*w, int(a)] for w, a in zip(prompts, answers)])
blank = PIL.Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE))
masks = region_masks([blank] * len(rows), [q.region for _, q in rows])
shown = {**inputs, "pixel_values": torch.stack([pixels_of(m) for m in masks])}
black = {**inputs, "pixel_values": pixels_of(blank).expand_as(pixels)}
region = targets_of_masks(model, shown, black)
inside = (region > 0).float()


def tell(name, t):
    t = t.clamp(min=0)
    t = t / t.sum(1, keepdim=True).clamp(min=1e-30)
    top = t.topk(7).indices
    rec = (region.gather(1, top)).sum(1)
    hit = inside.gather(1, t.topk(3).indices).amax(1)
    out = []
    for kind in ("color", "shape", "presence"):
        m = torch.tensor([q.kind == kind for _, q in rows])
        out.append(
            f"{kind} in {(t * inside).sum(1)[m].mean():.3f} recall7 {rec[m].mean():.3f} hit3 {hit[m].mean():.3f}"
        )
    print(f"{name:28}", "; ".join(out), flush=True)


print(len(rows), "patches in region", inside.sum(1).mean().item())
with torch.no_grad():
    tower = model.model.vision_tower
    states = []

    def keep(m, a, o):
        states.append(o[0] if isinstance(o, tuple) else o)


ids = inputs["input_ids"]
isv = ids == IMAGE
embeds = []
tstates = []


def enter(module, args, kwargs):
    kwargs["inputs_embeds"].retain_grad()
    embeds.append(kwargs["inputs_embeds"])


def leaf(module, args, out):
    o = (out[0] if isinstance(out, tuple) else out).detach().requires_grad_()
    tstates.append(o)
    return (o, *out[1:]) if isinstance(out, tuple) else o


from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

bias = torch.zeros(ids.shape, requires_grad=True)
tbias = torch.zeros(len(ids), 65, requires_grad=True)


def lm_attend(module, q, k, v, mask, scaling=None, **kw):
    m = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) + bias[:, None, None]
    return sdpa_attention_forward(module, q, k, v, m, scaling=scaling, **kw)


count = [0]


def tower_attend(module, q, k, v, mask, scaling=None, **kw):
    count[0] += 1
    m = tbias[:, None, None].expand(-1, -1, q.shape[2], -1) if count[0] > 3 else None
    kw.pop("is_causal", None)
    return sdpa_attention_forward(module, q, k, v, m, scaling=scaling, is_causal=False, **kw)


ALL_ATTENTION_FUNCTIONS.register("lmb", lm_attend)
ALL_MASK_ATTENTION_FUNCTIONS.register("lmb", lambda *a, **k: sdpa_mask(*a, **{**k, "allow_is_causal_skip": False}))
ALL_ATTENTION_FUNCTIONS.register("twb", tower_attend)
ALL_MASK_ATTENTION_FUNCTIONS.register("twb", sdpa_mask)
own = model.get_decoder().config._attn_implementation
model.get_decoder().set_attn_implementation("lmb")
tower.set_attn_implementation("twb")
layers = [m for n, m in tower.named_modules() if n.endswith("layers")][0]
h1 = layers[2].register_forward_hook(leaf)
h2 = model.get_decoder().register_forward_pre_hook(enter, with_kwargs=True)
logits = model(**inputs, use_cache=False, logits_to_keep=2).logits[:, 0]
print("accuracy", (logits.argmax(1) == answers).float().mean().item())
nn.functional.cross_entropy(logits, answers, reduction="sum").backward()
e = embeds[0]
n = len(rows)
h = e.detach()[isv].view(n, 64, -1)
g = e.grad[isv].view(n, 64, -1)
tell("embedding x gradient", -(g * h).sum(-1))
tell("same, centered", -(g * (h - h.mean(1, keepdim=True))).sum(-1))
tell("norm of gradient", (g.norm(dim=-1)))
tell("norm g x norm h", (g.norm(dim=-1) * h.norm(dim=-1)))
tell("abs g.h", (g * h).sum(-1).abs())
t = tstates[0]
ht = t.detach()[:, 1:]
gt = t.grad[:, 1:]
tell("tower state x gradient", -(gt * ht).sum(-1))
tell("same, centered", -(gt * (ht - ht.mean(1, keepdim=True))).sum(-1))
lb = -bias.grad[isv].view(n, 64)
tb = -tbias.grad[:, 1:]
tell("key bias, LM", lb)
tell("key bias, tower 4-6", tb)
tell("key bias, both", lb + tb)
hc = h - h.mean(1, keepdim=True)
tell("norm g x norm hc", g.norm(dim=-1) * hc.norm(dim=-1))
tell("its square", (g.norm(dim=-1) * hc.norm(dim=-1)) ** 2)
tell("square of norm g", g.norm(dim=-1) ** 2)
tell("sum |g hc|", (g * hc).abs().sum(-1))
tell("norm (g hc)", (g * hc).norm(dim=-1))
tell("square norm g, c>0", g.norm(dim=-1) ** 2 * ((g * hc).sum(-1) < 0))
