#!/usr/bin/env bash
# Trains on all hosts of a hostfile, started from one of them over ssh:
#   bash launch/multinode.sh HOSTFILE --data_path PATH [train flags]
# The hosts share this folder and the data under the same paths. With pdsh (or LAUNCHER=NAME, see `deepspeed --help`)
# the deepspeed launcher reaches the hosts; without it, or with LAUNCHER=ssh, it is started on each of them over ssh.
# LAUNCHER_FLAGS go to it. SIGTERM lets all ranks save and leave.
# Variables that decide how ranks compute and talk go to all hosts, tokens and keys only where PASS_ENV names them:
#   PASS_ENV="HF_TOKEN" bash launch/multinode.sh HOSTFILE ...
set -euo pipefail
if [ $# -eq 0 ] || [ ! -f "$1" ]; then
    echo "usage: bash launch/multinode.sh HOSTFILE --data_path PATH [train flags]   (see launch/hostfile.example)" >&2
    exit 2
fi
hostfile=$(realpath "$1")
mapfile -t hosts < <(sed -E 's/#.*//; s/^\s+//; /^$/d; s/\s.*//' "$hostfile")
for host in "${hosts[@]}"; do
    [[ $host =~ ^[A-Za-z0-9_][A-Za-z0-9_.@:-]*$ ]] || { echo "error: $hostfile: ${host@Q} is no host name" >&2; exit 2; }
done
cd "$(dirname "$0")/.."
source launch/setup.sh

# Nobody else can guess its name, make it first, or read what is in it.
session=$(mktemp -d "${TMPDIR:-/tmp}/ds_tokimg.XXXXXXXXXX")
trap 'rm -rf "$session"' EXIT
rm -f .deepspeed_env # earlier versions left one here, which all could read

named() { [[ " ${PASS_ENV:-} " == *" $1 "* ]]; }
variables=()
while IFS= read -r -d '' variable; do
    name=${variable%%=*}
    case $name in
        *TOKEN | *_KEY | *SECRET* | *PASSWORD* | *CREDENTIAL*) named "$name" || continue ;;
        PATH | PYTHONPATH | DS_* | DEEPSPEED_* | OMP_* | GLOO_* | NCCL_* | HF_*) ;;
        *) named "$name" || continue ;;
    esac
    [[ $variable == *$'\n'* ]] || variables+=("$variable")
done < <(env -0)

# A host that is gone is noticed within a minute.
alive="-o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=4"
launch=(deepspeed -q --no_local_rank --hostfile "$hostfile")
launcher=${LAUNCHER:-$(command -v pdsh >/dev/null && echo pdsh || echo ssh)}
if [ "$launcher" != ssh ]; then
    train=() lines=()
    for word in "${@:2}"; do
        if [ "$launcher" != pdsh ]; then
            train+=("$word")
        elif [[ $word == *' '* ]]; then # the launcher puts it between double quotes
            word=${word//\\/\\\\} word=${word//\$/\\\$}
            train+=("${word//\`/\\\`}")
        else # the launcher hands it to a shell as it is
            train+=("$(printf %q "$word")")
        fi
    done
    for variable in "${variables[@]}"; do
        value=${variable#*=}
        [ "$launcher" != pdsh ] || value=$(printf %q "$value")
        lines+=("${variable%%=*}=$value")
    done
    # The launcher hands on what a file says.
    (umask 077 && { cat ~/.deepspeed_env 2>/dev/null || true; printf '%s\n' "${lines[@]}"; } >"$session/environment")
    export DS_ENV_FILE=$session/environment PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} $alive"
    "${launch[@]}" --launcher "$launcher" ${LAUNCHER_FLAGS:-} --module ds_tokimg train "${train[@]}" &
    started=$!
    trap 'kill -TERM $started 2>/dev/null || true' TERM INT
    status=0
    wait $started || status=$?
    while kill -0 $started 2>/dev/null; do wait $started || status=$?; done
    exit $status
fi

address=$(ssh -n $alive -- "${hosts[0]}" hostname -I | cut -d ' ' -f 1)
# What is started on a host is one session, whose number is kept there so that it can be asked to end. The commands go
# in by standard input: a command line can be read by everybody on a host.
for rank in "${!hosts[@]}"; do
    command=("${launch[@]}" --no_ssh --node_rank "$rank" --master_addr "$address" ${LAUNCHER_FLAGS:-})
    command+=(--module ds_tokimg train "${@:2}")
    ssh $alive -- "${hosts[rank]}" exec bash -s <<END &
set -e
mkdir -m 700 ${session@Q}.$rank
trap 'rm -rf "$session.$rank"' EXIT
trap : TERM # it waits for what it started, which gets the signal too
echo \$\$ >${session@Q}.$rank/session
cd ${PWD@Q}
export ${variables[*]@Q}
${command[*]@Q} </dev/null
END
done
end() {
    for rank in "${!hosts[@]}"; do
        ssh -n $alive -- "${hosts[rank]}" "kill -TERM -- -\$(cat ${session@Q}.$rank/session)" 2>/dev/null || true
    done
}
trap end TERM INT
for _ in "${hosts[@]}"; do
    wait -n || { status=$?; end; wait; exit $status; }
done
