# Sourced by measure.sh: gets a machine ready, also a bare one with Python, torch and Triton alone and no network.
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export TORCHINDUCTOR_CACHE_DIR=$KIT_WORK/cache/inductor TRITON_CACHE_DIR=$KIT_WORK/cache/triton MPLCONFIGDIR=$KIT_WORK/mpl
export PATH=$PATH:/usr/local/nvidia/bin:/usr/local/cuda/bin
[[ -f $HERE/commit ]] && export MEDUET_COMMIT=$(<"$HERE/commit") # git describes another state, or nothing, where a copy runs

# What the machine lacks, if it was sent along.
SITE=$KIT_WORK/site
if [[ ! -f $SITE/.done ]] && compgen -G "$ROOT/.whl/*.whl" >/dev/null; then
  mkdir -p "$SITE"
  python3 -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$SITE" "$ROOT"/.whl/*.whl || {
    echo "pip could not install the wheels; they are unpacked instead"
    for wheel in "$ROOT"/.whl/*.whl; do python3 -m zipfile -e "$wheel" "$SITE"; done
  }
  touch "$SITE/.done"
fi

mkdir -p "$KIT_WORK/cache"
[[ -f $HERE/caches.tgz && ! -f $KIT_WORK/cache/.restored ]] &&
  tar xzf "$HERE/caches.tgz" -C "$KIT_WORK/cache" && touch "$KIT_WORK/cache/.restored" && echo "compilers' caches of the last call: unpacked"

# The installed layout without installing: kernels/ is meduet_fast.kernels; nothing else is importable from here.
FARM=$KIT_WORK/farm
rm -rf "$FARM"
mkdir -p "$FARM/meduet_fast"
for file in "$ROOT"/meduet_fast/*; do
  case ${file##*/} in __pycache__ | kernels) ;; *) ln -s "$file" "$FARM/meduet_fast/" ;; esac
done
ln -s "$ROOT/kernels" "$FARM/meduet_fast/kernels"
for file in benchmarks tests pyproject.toml; do ln -s "$ROOT/$file" "$FARM/"; done
export PYTHONPATH=$FARM:$SITE
cd "$FARM" || exit 2
