# Made from the usage text by make generate.
_durable_snapshotter() {
	local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} words=
	COMPREPLY=()
	case $prev in
	--config) mapfile -t COMPREPLY < <(compgen -f -- "$cur"); return ;;
	--root) mapfile -t COMPREPLY < <(compgen -f -- "$cur"); return ;;
	--address) mapfile -t COMPREPLY < <(compgen -f -- "$cur"); return ;;
	--log-level) mapfile -t COMPREPLY < <(compgen -W 'trace debug info warn error' -- "$cur"); return ;;
	--namespace) return ;;
	--to) return ;;
	--containerd-config) mapfile -t COMPREPLY < <(compgen -f -- "$cur"); return ;;
	--print-config) return ;;
	esac
	if ((COMP_CWORD == 1)); then
		words='serve inspect check repair migrate health doctor config version help'
	else
		case ${COMP_WORDS[1]} in
		serve) words='--config --root --address --log-level' ;;
		inspect) words='--json --config --root --address --log-level' ;;
		check) words='--deep --json --cached --images --namespace --config --root --address --log-level' ;;
		repair) words='--apply --deep --json --images --namespace --force --orphans --rebuild --config --root --address --log-level' ;;
		migrate) words='--to --finish --namespace --json --config --root --address --log-level' ;;
		health) words='--config --root --address --log-level' ;;
		doctor) words='--containerd-config --json --print-config --config --root --address --log-level' ;;
		config) words='default --config --root --address --log-level' ;;
		version) words='--config --root --address --log-level' ;;
		esac
	fi
	mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
}
complete -F _durable_snapshotter durable-snapshotter
