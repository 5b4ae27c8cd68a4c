set -u
pip install --no-deps --no-build-isolation -e . -q 2>&1 | tail -1
python3 -c "import torch, transformers, triton; print(torch.__version__, transformers.__version__, triton.__version__, torch.cuda.device_count())"
cat > /tmp/v.py <<'P'
import sys, argparse
from tedfx import verify_ranks
import importlib
v=importlib.import_module("tedfx.verify")
p=argparse.ArgumentParser(); v.add_arguments(p)
if __name__=="__main__":
    sys.exit(v.run(p.parse_args(sys.argv[1:])))
P
r() { local t0=$(date +%s); timeout ${T:-120} python3 /tmp/v.py "$@" > /tmp/log 2>&1; local rc=$?; echo "== $* rc=$rc $(( $(date +%s)-t0 ))s"; tail -${N:-14} /tmp/log | cut -c1-180; cat /tmp/log >> $OUT/all.log; }
r mixtral --mesh tp=2 --dtype float32 --traceback
r mixtral --mesh ep=2 --dtype float64 --traceback
N=6 r mixtral --mesh dp=2 --dtype float64 --traceback
N=6 r deepseek_v3 --mesh tp=2 --dtype float64
N=6 r gpt_oss --mesh ep=2 --dtype float64
T=160 r mixtral --mesh ep=2 --dtype float32 --compile --traceback
T=160 N=6 r mixtral --mesh tp=2 --dtype float32 --compile
T=160 N=6 r mixtral --mesh dp=2 --dtype bfloat16 --compile
