#!/usr/bin/env bash
# What a container of the image does, by its first word:
#   worker         check out DUET_REPO, then poll the Prefect work pool DUET_POOL. The default
#   node COMMAND   one pod of a training over several nodes (kubernetes-job.json); COMMAND is Prefect's, run by rank 0
#   rank COMMAND   one process of that training, started by torchrun
#   anything else  is run as it is: the servers of compose.yaml
# Credentials of the store come from AWS_* and stay in the environment; none is written to a file.
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}

need() {
  local name
  for name in "$@"; do
    [[ -n "${!name:-}" ]] || fail "$name is not set; docker/example.env says what it is"
  done
}

# The folder becomes a checkout of DUET_REPO at DUET_REF: a branch, tag or commit; by default what the remote's HEAD is.
check_out() {
  [[ -d .git ]] || git init --quiet
  git config remote.origin.url "$DUET_REPO"
  # Experiments too: a run with other params is one, so its commit can be given as DUET_REF.
  git fetch --quiet --tags origin '+HEAD:refs/remotes/origin/HEAD' '+refs/heads/*:refs/remotes/origin/*' \
    '+refs/exps/*:refs/exps/*'
  local ref="${DUET_REF:-HEAD}" commit
  commit=$(git rev-parse --quiet --verify "refs/remotes/origin/$ref^{commit}" ||
    git rev-parse --quiet --verify "$ref^{commit}") || fail "DUET_REF: the repository has no $ref"
  if git rev-parse --quiet --verify HEAD >/dev/null; then
    git checkout --quiet --detach "$commit" || fail "the checkout has changes of its own; commit or remove them"
  else # the image's copy of the code gives way, with what DUET_REF does not have
    git checkout --quiet --force --detach "$commit"
    git clean --quiet --force -d
  fi
  echo "code: $commit of ${DUET_REPO##*/}"
}

# The store that workers exchange results through, in .dvc/config.local, which git ignores. Outputs go there and
# experiments to DUET_REPO as soon as they are made, because nobody else can reach this folder.
set_remote() {
  dvc remote add --quiet --local --force --default store "$DUET_REMOTE"
  if [[ -z "${AWS_ENDPOINT_URL:-}" ]]; then
    unset AWS_ENDPOINT_URL # a template has it empty for AWS itself, which boto3 would take for an address
  elif [[ "$DUET_REMOTE" == s3://* ]]; then
    dvc remote modify --quiet --local store endpointurl "$AWS_ENDPOINT_URL"
  fi
  dvc config --quiet --local exp.auto_push true
  dvc config --quiet --local exp.git_remote origin
}

start_worker() {
  need DUET_REPO DUET_REMOTE PREFECT_API_URL DUET_POOL
  check_out
  set_remote
  export DUET_PROJECT="$PWD"
  exec prefect worker start --pool "$DUET_POOL" --type process --install-policy never --with-healthcheck
}

# Every node gets the inputs of DUET_STAGE, then torchrun starts its processes. DVC runs in rank 0 alone.
start_node() {
  need DUET_REPO DUET_REMOTE DUET_STAGE DUET_TOPOLOGY DUET_MASTER JOB_COMPLETION_INDEX
  local nodes="${DUET_TOPOLOGY%x*}" processes="${DUET_TOPOLOGY#*x}" before
  check_out
  set_remote
  export DUET_PROJECT="$PWD"
  before=$(dvc dag --dot "$DUET_STAGE" | python -c '
import sys
from tasks.dvc_process import parse_dot
print(*parse_dot(sys.stdin.read())[sys.argv[1]], sep="\n")' "$DUET_STAGE")
  # shellcheck disable=SC2086 # names of stages have no spaces
  dvc pull --quiet $before
  dvc pull --quiet "$DUET_STAGE" 2>/dev/null || true # absent until it is trained
  if dvc status --quiet "$DUET_STAGE"; then
    echo "$DUET_STAGE is up to date: nothing to train"
    ((JOB_COMPLETION_INDEX == 0)) && exec "$@"
    exit 0
  fi
  wait_for_name "$DUET_MASTER"
  # Static rendezvous: rank 0 is on the pod of index 0, where Prefect looks. Nodes may still be pulling, hence the time.
  exec torchrun --nnodes "$nodes" --nproc-per-node "$processes" --node-rank "$JOB_COMPLETION_INDEX" \
    --master-addr "$DUET_MASTER" --master-port "${DUET_MASTER_PORT:-29500}" --rdzv-conf timeout=1800 \
    --no-python "$0" rank "$@"
}

# The name of the pod of index 0 is known only once that pod has started.
wait_for_name() {
  local _
  for _ in {1..300}; do
    getent hosts "$1" >/dev/null && return
    sleep 2
  done
  fail "$1 has no address after ten minutes; is the Service of docker/kubernetes.yaml there?"
}

# Rank 0's command ends in `dvc repro`, whose training inherits torchrun's variables and meets the others.
start_rank() {
  ((RANK == 0)) && exec "$@"
  exec python -m tasks.train "${DUET_STAGE#*@}" "${DUET_STAGE%@*}"
}

case "${1:-worker}" in
  worker) start_worker ;;
  node) shift && start_node "$@" ;;
  rank) shift && start_rank "$@" ;;
  *) exec "$@" ;;
esac
