package seal

// dirCursor goes through directories in the order of a walk.
type dirCursor struct {
	d      *Dirs
	i      uint32
	path   string
	around []dirLevel // the node itself last
}

type dirLevel struct {
	end    uint32
	length int // of its path; 0 of the root
}

func (d *Dirs) first() dirCursor {
	c := dirCursor{d: d}
	c.move(0)
	return c
}

func (c *dirCursor) done() bool { return int(c.i) >= len(c.d.nodes) }

// move goes on to the node i: the next one, or the one after all that are below
// the present one.
func (c *dirCursor) move(i uint32) {
	for len(c.around) > 0 && c.around[len(c.around)-1].end <= i {
		c.around = c.around[:len(c.around)-1]
	}
	c.i = i
	if c.done() {
		return
	}
	length := 0
	switch name := string(c.d.name(i)); {
	case i == 0:
		c.path = "."
	case c.around[len(c.around)-1].length == 0:
		c.path = name
		length = len(name)
	default:
		c.path = c.path[:c.around[len(c.around)-1].length] + "/" + name
		length = len(c.path)
	}
	c.around = append(c.around, dirLevel{c.d.nodes[i].end, length})
}
