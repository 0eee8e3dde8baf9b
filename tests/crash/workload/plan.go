package workload

import (
	"fmt"
	"math/rand/v2"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
)

// Plan is what there is to do.
type Plan struct {
	Seed   uint64
	Chains []Chain

	byName map[string]*Layer
}

// Chain is an image: layers one above the other, in one namespace.
type Chain struct {
	Namespace string
	Layers    []*Layer
	Remove    bool // the top layer is removed once, and extracted again
}

// Size of a Plan.
type Size struct {
	Chains int
	Layers int // of each chain
}

// Small is about 3 MiB of layers, which all file systems write in about a
// second.
var Small = Size{Chains: 3, Layers: 4}

// NewPlan makes a plan. The same seed makes the same plan.
func NewPlan(seed uint64, size Size) (*Plan, error) {
	p := &Plan{Seed: seed, byName: map[string]*Layer{}}
	number := 0
	for c := range size.Chains {
		chain := Chain{Namespace: []string{"k8s.io", "default"}[c%2], Remove: c%2 == 1}
		var diffIDs []digest.Digest
		for depth := range size.Layers {
			content, err := build(rand.New(rand.NewPCG(seed, uint64(c)<<32|uint64(depth))), depth)
			if err != nil {
				return nil, fmt.Errorf("plan %d: %w", seed, err)
			}
			diffIDs = append(diffIDs, digest.FromBytes(content))
			number++
			l := &Layer{
				ChainID: identity.ChainID(diffIDs).String(),
				DiffID:  diffIDs[depth],
				Tar:     content,
			}
			// containerd's name for the back end: namespace, a number, chain ID.
			l.Name = fmt.Sprintf("%s/%d/%s", chain.Namespace, number, l.ChainID)
			if depth > 0 {
				l.Parent = chain.Layers[depth-1].Name
			}
			chain.Layers = append(chain.Layers, l)
			p.byName[l.Name] = l
		}
		p.Chains = append(p.Chains, chain)
	}
	return p, nil
}

// PlanOf returns a plan without chains that knows the layers.
func PlanOf(seed uint64, layers []*Layer) *Plan {
	p := &Plan{Seed: seed, byName: map[string]*Layer{}}
	for _, l := range layers {
		p.byName[l.Name] = l
	}
	return p
}

// Layer returns the layer of a committed name, or nil.
func (p *Plan) Layer(name string) *Layer { return p.byName[name] }

// Top returns the highest layer of the chain.
func (c *Chain) Top() *Layer { return c.Layers[len(c.Layers)-1] }

// Namespace returns the namespace in the name of a layer.
func (l *Layer) namespace() string {
	for i, r := range l.Name {
		if r == '/' {
			return l.Name[:i]
		}
	}
	return ""
}
