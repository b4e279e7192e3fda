"""How Triton spreads the dots of the steering kernel over lanes, read from its intermediate code, without a GPU.

    PYTHONPATH=kernels python tests/kernels/dot_layouts.py

prints one JSON line per case: the layouts that occur when only the numbers of tokens and directions change. More than
one means that they reach the order of additions. Its own process, because TRITON_INTERPRET=1 replaces the compiler.
"""

import json
import re

from qscope_kernels import steer_add as kernels
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

# h, readers, gates and directions, D, pointers that are not on a 16-byte boundary.
CASES = (
    ("bf16", "bf16", "bf16", "bf16", 4096, ()),
    ("fp32", "fp32", None, "fp32", 5120, ()),
    ("bf16", "fp32", "fp32", "fp32", 4096, ()),
    ("fp32", None, "bf16", "bf16", 64, ()),
    ("bf16", "bf16", "bf16", "bf16", 1531, ()),
    ("bf16", "bf16", "bf16", "bf16", 4096, ("readers_ptr", "gates_ptr", "directions_ptr")),
)
SIZES = ((1, 1), (333, 3), (700, 2), (8192, 8))  # N, S
ITEMSIZE = {"bf16": 2, "fp32": 4}


def layouts(case: tuple, N: int, S: int) -> set[str]:
    h, readers, gates, directions, D, displaced = case
    aligned = D % 16 == 0 and not displaced
    cfg = kernels.rows_config(N, S, D, max(ITEMSIZE[t] for t in (h, readers, gates) if t), aligned)
    sizes = {"h_stride": D, "mask_stride": S, "mask_stride_s": 1, "N": N, "S": S, "D": D}
    pointers = {"h_ptr": h, "directions_ptr": directions, "settings_ptr": "fp32", "readers_ptr": readers}
    pointers |= {"gates_ptr": gates, "mask_ptr": "u8", "fired_ptr": "u8", "c_ptr": "fp32"}
    types = {name: f"*{kind}" for name, kind in pointers.items() if kind}
    types |= {name: "i32" for name, value in sizes.items() if value != 1}
    constants = {name: None for name, kind in pointers.items() if not kind}
    constants |= {name: 1 for name, value in sizes.items() if value == 1}
    constants |= {"BT": cfg.rows, "SB": cfg.directions, "BD": cfg.block_d, "VEC": cfg.vec}
    names = kernels._steer_rows_kernel.arg_names
    multiples = {name for name in types if sizes.get(name, 0) % 16 == 0} - set(displaced)
    source = ASTSource(
        fn=kernels._steer_rows_kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in multiples},
    )
    target = GPUTarget("cuda", 90, 32)
    backend, context, stages, metadata = make_backend(target), ir.context(), {}, {}
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options(cfg.options())
    parts = backend.get_codegen_implementation(options), backend.get_module_map()
    code = source.make_ir(target, options, *parts, context)
    backend.add_stages(stages, options, source.language)
    for stage in ("ttir", "ttgir"):
        code = stages[stage](code, metadata)
    text = str(code)
    named = dict(re.findall(r"^(#\w+) = #ttg\.blocked(<.*>)$", text, re.MULTILINE))
    # The sum over neighbours; the sum over lanes that follows keeps its layout.
    sums = re.findall(r'"tt\.reduce"\(%\S+\) <\{axis = 2 : i32.*?\}\) : \(tensor<\d+x(\S+), (#\w+)>', text, re.DOTALL)
    assert sums, "no sum over neighbours was found: the intermediate code looks different"
    return {f"{shape} {named[layout]}" for shape, layout in sums}


if __name__ == "__main__":
    for case in CASES:
        found = set().union(*(layouts(case, N, S) for N, S in SIZES))
        print(json.dumps({"case": case, "layouts": sorted(found)}), flush=True)
