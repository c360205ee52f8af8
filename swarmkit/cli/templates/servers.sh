
server=(@@server)
options=(@@options)
per_node=@@per_node # servers of a node
gpus=@@gpus # of a server
port=@@port # of the first server of a node
suffix=@@suffix # of the nodes' names
hostfile=@@hostfile
python=@@python
key_file=$hostfile.key
logs=$hostfile.logs

# Both run on every node.
setup() {
  :
@@setup
}
serve() {
  servers=()
  trap 'kill "${servers[@]}" 2>/dev/null; wait' EXIT
  trap 'exit 0' HUP INT TERM
  VLLM_API_KEY=$(<"$key_file")
  export VLLM_API_KEY ZE_FLAT_DEVICE_HIERARCHY=FLAT # each tile is a device
  for ((i = 0; i < per_node; i++)); do
    devices=$(seq -s, $((i * gpus)) $((i * gpus + gpus - 1)))
    CUDA_VISIBLE_DEVICES=$devices ZE_AFFINITY_MASK=$devices "${server[@]}" --port $((port + i)) \
      --tensor-parallel-size "$gpus" "${options[@]}" >"$logs/$(hostname)-$((port + i)).log" 2>&1 &
    servers+=($!)
  done
  wait
}

stop() {
  rm -f "$hostfile" "$hostfile.starting" "$key_file"
  kill "${running[@]}" 2>/dev/null || true
  wait
}

set -eo pipefail
umask 077 # the key, and prompts in the logs
running=()
trap stop EXIT
trap 'exit 143' HUP INT TERM
mkdir -p "$logs"
rm -f "$hostfile" "$key_file"
# Everybody on the cluster can reach the servers: they want a key of this job's own, which no command line ever has.
od -An -N24 -tx1 /dev/urandom | tr -d ' \n' >"$key_file"

{
  declare -p server options per_node gpus port key_file logs
  declare -f setup serve
  echo "setup; serve"
} >"$logs/node.sh"
on_every_node bash "$logs/node.sh" </dev/null &
running+=($!)

"$python" -P - "$port" "$per_node" "$suffix" >"$hostfile.starting" <<'END'
import sys
import swarmkit as sk

port, per_node, suffix = sys.argv[1:]
for endpoint in sk.hosts_from_env(int(port), int(per_node), suffix):
    print(endpoint.name, "key_env=@@key_env")
END
@@key_env=$(<"$key_file")
export @@key_env
"$python" -P -m swarmkit wait --hostfile "$hostfile.starting" --output "$hostfile" --min 0.5 --patience 600 &
running+=($!)
until [ -s "$hostfile" ]; do
  sleep 1
  if ! kill -0 "${running[0]}" 2>/dev/null || ! kill -0 "${running[1]}" 2>/dev/null; then break; fi
done
if [ ! -s "$hostfile" ]; then
  echo "too few servers are up: see what they say in $logs" >&2
  exit 1
fi
wait "${running[0]}" # the servers, to the end of the job
