# Sourced by the recipes and the Slurm scripts, which give a length of their own.

# length_flags FLAGS...: the array `flags` becomes FLAGS with one of --train-steps and
# --train-epochs, which exclude each other: the last one given.
length_flags() {
    local length=()
    flags=()
    while (($#)); do
        case "$1" in
            --train[-_]steps=* | --train[-_]epochs=*) length=("$1") ;;
            --train[-_]steps | --train[-_]epochs) length=("${@:1:2}"); (($# == 1)) || shift ;;
            *) flags+=("$1") ;;
        esac
        shift
    done
    flags+=(${length[@]+"${length[@]}"})
}
