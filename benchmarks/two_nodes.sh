#!/usr/bin/env bash
# Two "nodes" on one machine: two network namespaces joined by a veth pair with a bandwidth limit, gloo ranks in each, tensor parallel inside a
# node and expert parallel across the link. Measures a step with TED's two savings off and on at several link speeds, beside the prediction of
# the cost expressions. docs/two_nodes.md says what is measured and how.
#
#   benchmarks/two_nodes.sh [--big] [--rates "50 100 200 500"] [--steps N] [--out DIR]
#
#   --big    four ranks per node (ep=2,tp=4) instead of two (ep=2,tp=2)
#   --rates  link speeds in Mbit/s; one without a limit is always added
#   --steps  rounds; in each, the baseline and both savings together take a step at every speed (two at the higher ones)
#   --out    where two_nodes.jsonl and two_nodes.png go (default benchmarks/results)
#
# PYTHON names the interpreter (default: .venv/bin/python of the checkout, else python3). Needs iproute2; root, or user namespaces. Everything happens
# in network and mount namespaces of its own, so that nothing is seen outside of them and nothing is left when they end.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
inside=${TEDFX_TWO_NODES_INSIDE:-}
unset TEDFX_TWO_NODES_INSIDE

skip() {
    echo "two_nodes: skipped: $1"
    exit 0
}

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ ! -x "$root/.venv/bin/python" ] || PYTHON=$root/.venv/bin/python
fi
export PYTHON

if [ -z "$inside" ]; then
    # Options are read here once, so that a wrong one is told before anything is set up.
    "$PYTHON" "$here/two_nodes.py" --check "$@"
    case " $* " in *" -h "* | *" --help "*) exit 0 ;; esac
    for tool in ip tc unshare mount timeout; do
        command -v "$tool" >/dev/null || skip "$tool is not installed (iproute2, util-linux, coreutils)"
    done
    enter=(unshare --net --mount)
    [ "$(id -u)" = 0 ] || enter+=(--user --map-root-user)
    reason=$("${enter[@]}" true 2>&1) || skip "network namespaces are not allowed here: ${reason:-unshare failed}"
    export TEDFX_TWO_NODES_INSIDE=1
    exec "${enter[@]}" -- bash "$here/two_nodes.sh" "$@"
fi

nodes=()

# shellcheck disable=SC2329  # the trap calls it
cleanup() {
    trap - EXIT
    trap '' INT TERM HUP
    exec 2>/dev/null # bash would report every process that is killed here
    for node in "${nodes[@]}"; do
        # The ranks are in here and nobody else.
        ip netns pids "$node" | xargs -r kill -KILL || true
        ip netns del "$node" || true
    done
    wait || true
}
trap cleanup EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# `try command ..` skips with the command's own words where it is refused.
try() {
    local words
    words=$("$@" 2>&1) || skip "network namespaces are not allowed here: '$*': ${words:-failed}"
}

try mount -t tmpfs tmpfs /run # so that the names of the namespaces are ours alone
for node in node0 node1; do
    try ip netns add "$node"
    nodes+=("$node")
    try ip -n "$node" link set lo up # ranks of one node talk over this
done
try ip -n node0 link add link0 type veth peer name link1 netns node1
for i in 0 1; do
    try ip -n "node$i" addr add "10.66.0.$((i + 1))/30" dev "link$i"
    try ip -n "node$i" link set "link$i" up
    try ip netns exec "node$i" tc qdisc replace dev "link$i" root tbf rate 50mbit burst 16kb limit 16mb
    try ip netns exec "node$i" tc qdisc del dev "link$i" root
done

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 TORCH_CPP_LOG_LEVEL=ERROR
for i in 1 0; do
    GLOO_SOCKET_IFNAME=link$i ip netns exec "node$i" timeout -k 5 900 "$PYTHON" "$here/two_nodes.py" --node "$i" --device "link$i" --address 10.66.0.1 "$@" &
done

# Whoever fails first has the reason; the other one is then ended by `cleanup`.
code=0
for _ in 0 1; do
    wait -n || { code=$?; break; }
done
exit "$code"
