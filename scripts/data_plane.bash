# SPDX-License-Identifier: MIT
# shellcheck shell=bash
#
# data_plane — the data plane without Python, built to find mistakes: for scripts/sanitize and scripts/stress to source.

export ASAN_OPTIONS=${ASAN_OPTIONS:-detect_leaks=1:abort_on_error=0:exitcode=97}
export UBSAN_OPTIONS=${UBSAN_OPTIONS:-halt_on_error=1:print_stacktrace=1:exitcode=97}
export TSAN_OPTIONS=${TSAN_OPTIONS:-halt_on_error=1:exitcode=97:second_deadlock_stack=1}

launcher=() # what its programs are started by

# Targets into a directory, with its checks and a sanitizer (or none). Says what failed, in the name of the script.
data_plane_build() { # SCRIPT KIND DIRECTORY TARGET…
	local script=$1 kind=$2 directory=$3 log=$3.log
	mkdir -p build
	# ThreadSanitizer of gcc 12 knows no address space with as much randomness as kernels give today.
	[[ $kind != thread ]] || launcher=(setarch "$(uname -m)" -R)
	printf '%s: building with %s (log: %s)\n' "$script" "$kind" "$log"
	if ! {
		[[ -f $directory/build.ninja ]] ||
			meson setup "$directory" --buildtype=debugoptimized "-Db_sanitize=$kind" -Db_lundef=false \
				"-Dwerror=$([[ ${CI:-} == true ]] && echo true || echo false)" \
				-Dvswap_debug=true -Dvswap_python=false
		ninja -C "$directory" "${@:4}"
	} >"$log" 2>&1; then
		tail -n 30 "$log" >&2
		printf '%s: the build failed; rm -r %s starts afresh\n' "$script" "$directory" >&2
		exit 1
	fi
}
