#!/bin/sh
# Two hosts on one machine, as network namespaces with names of their own: two-hosts.sh COMMAND...
# runs the command on hosta with Open MPI set up to reach hostb. Needs root and iproute2.
#
#   scripts/two-hosts.sh meshweave run plan --backend mpi --hosts hosta:2,hostb:2
set -eu

scratch=$(mktemp -d)
a=weavea$$ b=weaveb$$
clean() {
    ip netns del $a 2>/dev/null || true
    ip netns del $b 2>/dev/null || true
    rm -rf "$scratch" /etc/netns/$a /etc/netns/$b
}
trap clean EXIT
trap 'exit 130' INT TERM

ip netns add $a
ip netns add $b
ip link add va$$ netns $a type veth peer name vb$$ netns $b
ip -n $a addr add 10.213.77.1/24 dev va$$
ip -n $b addr add 10.213.77.2/24 dev vb$$
for name in $a $b; do
    ip -n $name link set lo up
    mkdir -p /etc/netns/$name
    printf '127.0.0.1 localhost\n10.213.77.1 hosta\n10.213.77.2 hostb\n' >/etc/netns/$name/hosts
done
ip -n $a link set va$$ up
ip -n $b link set vb$$ up

# What Open MPI starts its daemons with, in the place of ssh: agent HOST COMMAND...
cat >"$scratch/agent" <<AGENT
#!/bin/sh
shift
exec ip netns exec $b unshare --uts sh -c "hostname hostb; \$*"
AGENT
chmod +x "$scratch/agent"

export OMPI_MCA_plm_rsh_agent="$scratch/agent" OMPI_MCA_btl=tcp,vader,self OMPI_MCA_pml=ob1
export OMPI_MCA_btl_tcp_if_include=10.213.77.0/24 OMPI_MCA_oob_tcp_if_include=10.213.77.0/24
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
ip netns exec $a unshare --uts sh -c 'hostname hosta; exec "$@"' sh "$@"
