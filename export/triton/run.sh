#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Start Triton Inference Server on this model repository; further arguments go to tritonserver.
#
# tritonserver is taken from PATH (NVIDIA's container), or else from the nvidia-pytriton wheel of the
# python3 on PATH, which must be the Python that has onnxruntime and tokenizers.
#
#   HOST=127.0.0.1 HTTP_PORT=8000 GRPC_PORT=8001 METRICS_PORT=8002 ./run.sh
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
host=${HOST:-127.0.0.1}
http=${HTTP_PORT:-8000} grpc=${GRPC_PORT:-8001} metrics=${METRICS_PORT:-8002}
flags=(
  --model-repository="$repository"
  --model-control-mode=none
  --disable-auto-complete-config
  --http-address="$host" --http-port="$http"
  --grpc-address="$host" --grpc-port="$grpc"
  --metrics-address="$host" --metrics-port="$metrics"
  --backend-config=python,shm-region-prefix-name="quarot_${http}_"
)
for plugins in "$repository"/*/1/plugins/libquarot_plugins.so; do
  if [[ -f $plugins ]]; then # for an engine that Triton's TensorRT backend loads by itself
    flags+=(--backend-config=tensorrt,plugins="$plugins")
  fi
done

if command -v tritonserver >/dev/null; then
  exec tritonserver "${flags[@]}" "$@"
fi

# Two lines: the packages' directory and that of the shared libpython; a third where one is missing.
mapfile -t python < <(
  python3 - <<'PY'
import importlib.util, pathlib, sysconfig

modules = ("pytriton", "numpy", "onnxruntime", "tokenizers", "ml_dtypes")
missing = [name for name in modules if not importlib.util.find_spec(name)]
library = pathlib.Path(sysconfig.get_config_var("LIBDIR") or "/")
name = sysconfig.get_config_var("INSTSONAME") or ""
print(sysconfig.get_path("purelib"))
print(library)
if missing:
    print(f"python3 has no {', '.join(missing)}; pip install nvidia-pytriton onnxruntime tokenizers")
elif ".so" not in name or not (library / name).exists():
    print("python3 has no shared libpython; use a Python that was built with --enable-shared")
PY
)
if [[ ${#python[@]} -ne 2 ]]; then
  echo "run.sh: no tritonserver on PATH and ${python[2]:-no python3 on PATH}" >&2
  exit 5
fi
server=${python[0]}/pytriton/tritonserver
version=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')

# The wheel keeps the Python backend and its stubs apart; Triton wants them in one directory.
backends=$(mktemp -d)
trap 'rm -rf "$backends"' EXIT
cp -r "$server/backends/python" "$backends/python"
cp "$server/python_backend_stubs/$version/triton_python_backend_stub" "$backends/python/"
chmod +x "$backends/python/triton_python_backend_stub"

export LD_LIBRARY_PATH="${python[0]}/nvidia_pytriton.libs:${python[1]}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
"$server/bin/tritonserver" "${flags[@]}" \
  --backend-directory="$backends" --cache-directory="$server/caches" "$@" &
child=$!
trap 'kill -TERM $child' TERM INT
status=0
wait $child || status=$?   # a signal ends the first wait, not the server
while kill -0 $child 2>/dev/null; do wait $child || status=$?; done
exit $status
