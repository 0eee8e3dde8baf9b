# Made from the usage text by make generate.
complete -c durable-snapshotter -f
complete -c durable-snapshotter -n __fish_use_subcommand -a serve -d 'serve containerd on a unix socket'
complete -c durable-snapshotter -n __fish_use_subcommand -a inspect -d 'print snapshots and commit journal'
complete -c durable-snapshotter -n __fish_use_subcommand -a check -d 'compare committed layers with their seals'
complete -c durable-snapshotter -n __fish_use_subcommand -a repair -d 'print how damaged layers can be healed'
complete -c durable-snapshotter -n __fish_use_subcommand -a migrate -d 'unpack images that another snapshotter has into this one'
complete -c durable-snapshotter -n __fish_use_subcommand -a health -d 'print whether a running daemon serves'
complete -c durable-snapshotter -n __fish_use_subcommand -a doctor -d 'print what keeps this node from using the snapshotter'
complete -c durable-snapshotter -n __fish_use_subcommand -a config -d 'print the configuration in effect'
complete -c durable-snapshotter -n __fish_use_subcommand -a version -d 'print the version'
complete -c durable-snapshotter -n 'not __fish_use_subcommand' -l config -rF -d 'configuration (default /etc/durable-snapshotter/config.toml)'
complete -c durable-snapshotter -n 'not __fish_use_subcommand' -l root -rF -d 'where snapshots live'
complete -c durable-snapshotter -n 'not __fish_use_subcommand' -l address -rF -d 'unix socket'
complete -c durable-snapshotter -n 'not __fish_use_subcommand' -l log-level -x -a 'trace debug info warn error' -d 'trace'
complete -c durable-snapshotter -n '__fish_seen_subcommand_from inspect' -l json
complete -c durable-snapshotter -n '__fish_seen_subcommand_from check' -l deep
complete -c durable-snapshotter -n '__fish_seen_subcommand_from check' -l json
complete -c durable-snapshotter -n '__fish_seen_subcommand_from check' -l cached
complete -c durable-snapshotter -n '__fish_seen_subcommand_from check' -l images
complete -c durable-snapshotter -n '__fish_seen_subcommand_from check' -l namespace -x
complete -c durable-snapshotter -n '__fish_seen_subcommand_from repair' -l apply
complete -c durable-snapshotter -n '__fish_seen_subcommand_from repair' -l deep
complete -c durable-snapshotter -n '__fish_seen_subcommand_from repair' -l json
complete -c durable-snapshotter -n '__fish_seen_subcommand_from repair' -l images
complete -c durable-snapshotter -n '__fish_seen_subcommand_from repair' -l namespace -x
complete -c durable-snapshotter -n '__fish_seen_subcommand_from repair' -l force
complete -c durable-snapshotter -n '__fish_seen_subcommand_from repair' -l orphans
complete -c durable-snapshotter -n '__fish_seen_subcommand_from repair' -l rebuild
complete -c durable-snapshotter -n '__fish_seen_subcommand_from migrate' -l to -x
complete -c durable-snapshotter -n '__fish_seen_subcommand_from migrate' -l finish
complete -c durable-snapshotter -n '__fish_seen_subcommand_from migrate' -l namespace -x
complete -c durable-snapshotter -n '__fish_seen_subcommand_from migrate' -l json
complete -c durable-snapshotter -n '__fish_seen_subcommand_from doctor' -l containerd-config -rF
complete -c durable-snapshotter -n '__fish_seen_subcommand_from doctor' -l json
complete -c durable-snapshotter -n '__fish_seen_subcommand_from doctor' -l print-config -x
complete -c durable-snapshotter -n '__fish_seen_subcommand_from config' -a default
