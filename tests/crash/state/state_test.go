package state

import (
	"bytes"
	"fmt"
	"os"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

func TestMain(m *testing.M) {
	disk.Init()
	os.Exit(kit.Main(m.Run))
}

// write fills whole blocks with one letter.
func write(letter byte, blocks ...int64) disk.Entry {
	return disk.Entry{
		Kind: disk.Write, Offset: blocks[0] * Block, Length: int64(len(blocks)) * Block,
		Data: bytes.Repeat([]byte{letter}, len(blocks)*Block),
	}
}

var flush = disk.Entry{Kind: disk.Flush}

func mark(s string) disk.Entry { return disk.Entry{Kind: disk.Mark, Text: s} }

func discard(block int64) disk.Entry {
	return disk.Entry{Kind: disk.Discard, Offset: block * Block, Length: Block}
}

// picture prints an image, one character a block.
func picture(image []byte) string {
	var b bytes.Buffer
	for at := 0; at < len(image); at += Block {
		if c := image[at]; c == 0 {
			b.WriteByte('.')
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}

// pictures prints the disks of the cases, in order.
func pictures(t *testing.T, l *Log, cases []Case, blocks int) []string {
	t.Helper()
	var out []string
	for _, c := range cases {
		image := make([]byte, blocks*Block)
		for i := range l.Durable(c.State.Point) {
			l.Entries[i].Apply(image)
		}
		l.Make(c.State, image)
		out = append(out, fmt.Sprintf("%s %s %v", picture(image), c.State, c.Points))
	}
	return out
}

// TestEnumerate is the model in small: what a power cut can leave of three
// blocks.
func TestEnumerate(t *testing.T) {
	for _, row := range []struct {
		name string
		log  []disk.Entry
		want []string // picture, name, points
	}{
		{"one write", []disk.Entry{write('a', 0)}, []string{
			"... 0.prefix [0 1]",
			"a.. 1.prefix [1]",
		}},
		{"a flush makes it certain", []disk.Entry{write('a', 0), flush, write('b', 1)}, []string{
			"... 0.prefix [0 1]",
			"a.. 1.prefix [1 2 3]",
			"ab. 3.prefix [3]",
		}},
		{"two writes in any order", []disk.Entry{write('a', 0), write('b', 1)}, []string{
			"... 0.prefix [0 1 2]",
			"a.. 1.prefix [1 2]",
			"ab. 2.prefix [2]",
			".b. 2.drop.0 [2]",
		}},
		{"a later version may be lost, an earlier one can come back", []disk.Entry{write('a', 0), flush, write('b', 0), write('c', 0)}, []string{
			"... 0.prefix [0 1]",
			"a.. 1.prefix [1 2 3 4]",
			"b.. 3.prefix [3 4]",
			"c.. 4.prefix [4]",
		}},
		{"a discard is a write of zeroes", []disk.Entry{write('a', 0), flush, discard(0)}, []string{
			"... 0.prefix [0 1]", // of a block that the log has not touched, nothing is known
			"a.. 1.prefix [1 2 3]",
			"... 3.prefix [3]",
		}},
		{"the same disk is one case, also across a mark", []disk.Entry{write('a', 0), flush, mark("ack"), write('a', 0)}, []string{
			"... 0.prefix [0 1]",
			"a.. 1.prefix [1 2 3 4]",
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			l := NewLog(row.log)
			got := pictures(t, l, Enumerate(l, Options{}), 3)
			same := len(got) == len(row.want)
			for _, g := range got {
				var found bool
				for _, w := range row.want {
					// Of several names of a disk, which one it gets does not
					// matter; drop.0 is keep.1 here.
					found = found || g[:4] == w[:4] && g[len(g)-3:] == w[len(w)-3:]
				}
				same = same && found
			}
			if !same {
				t.Errorf("got\n%s\nwant\n%s", lines(got), lines(row.want))
			}
		})
	}
}

func lines(s []string) string {
	var b bytes.Buffer
	for _, x := range s {
		fmt.Fprintln(&b, x)
	}
	return b.String()
}

// TestEveryStateIsLegal: whatever the class, a block holds what it held at the
// last flush, or what one of the writes since then left there.
func TestEveryStateIsLegal(t *testing.T) {
	log := []disk.Entry{
		write('a', 0, 1, 2, 3, 4, 5), write('b', 2, 3), flush,
		write('c', 0, 1, 2), write('d', 1, 2, 3), mark("ack"), write('e', 5), write('f', 2, 3, 4), discard(4),
		write('g', 0), flush, write('h', 0, 1, 2, 3, 4, 5), write('i', 1),
	}
	l := NewLog(log)
	seen := map[Class]int{}
	for _, c := range Enumerate(l, Options{Seed: 7, Want: 4000}) {
		seen[c.State.Class]++
		for _, point := range c.Points {
			image := make([]byte, 6*Block)
			for i := range l.Durable(c.State.Point) {
				log[i].Apply(image)
			}
			l.Make(c.State, image)
			for block := range int64(6) {
				if got, legal := picture(image[block*Block : (block+1)*Block])[0], versions(l, point, block); !bytes.ContainsRune(legal, rune(got)) {
					t.Fatalf("%s at point %d: block %d holds %c, legal are %s", c.State, point, block, got, legal)
				}
			}
		}
	}
	for _, c := range Classes() {
		// What only flushes made is the prefix at the flush: one case, there.
		if c != Flushed && seen[c] == 0 {
			t.Errorf("no state of class %s", c)
		}
	}
}

// versions lists what a block may hold when the power goes at the point.
func versions(l *Log, point int, block int64) []byte {
	image := make([]byte, 6*Block)
	now := func() byte { return picture(image[block*Block : (block+1)*Block])[0] }
	for i := range l.Durable(point) {
		l.Entries[i].Apply(image)
	}
	legal := []byte{now()}
	for _, i := range l.Volatile(point) {
		l.Entries[i].Apply(image)
		legal = append(legal, now())
	}
	return legal
}

// TestMixReachesAll: the general class finds every disk that the model allows.
func TestMixReachesAll(t *testing.T) {
	l := NewLog([]disk.Entry{write('a', 0, 1), write('b', 1, 2), write('c', 1)})
	found := map[string]bool{}
	for n := range uint64(2000) {
		image := make([]byte, 3*Block)
		l.Make(State{3, Mix, n}, image)
		found[picture(image)] = true
	}
	// Block 0: nothing, a. Block 1: nothing, a, b, c. Block 2: nothing, b.
	if len(found) != 2*4*2 {
		t.Errorf("%d disks, want 16: %v", len(found), found)
	}
}

func TestWant(t *testing.T) {
	var log []disk.Entry
	for i := range 40 {
		log = append(log, write(byte('a'+i%26), int64(i), int64(i+1)))
		if i%10 == 9 {
			log = append(log, flush, mark("ack"))
		}
	}
	l := NewLog(log)
	for _, want := range []int{0, 100, 200, 1000} {
		cases := Enumerate(l, Options{Seed: 1, Want: want})
		if want >= 100 && len(cases) != want {
			t.Errorf("requested %d cases, got %d", want, len(cases))
		}
		again := Enumerate(l, Options{Seed: 1, Want: want})
		if fmt.Sprint(cases) != fmt.Sprint(again) {
			t.Errorf("%d cases: the same seed gives other cases", want)
		}
		for i := 1; i < len(cases); i++ {
			if l.Durable(cases[i].State.Point) < l.Durable(cases[i-1].State.Point) {
				t.Fatalf("case %d goes back in the log", i)
			}
		}
	}
}

func TestNames(t *testing.T) {
	p := Path{{1234, Prefix, 0}, {17, Drop, 3}, {5, Mix, 0x9f3a1b}}
	if got := p.String(); got != "1234.prefix>17.drop.3>5.mix.9f3a1b" {
		t.Errorf("printed %q", got)
	}
	again, err := ParsePath(p.String())
	if err != nil || fmt.Sprint(again) != fmt.Sprint(p) {
		t.Errorf("read back %v, %v", again, err)
	}
	for _, bad := range []string{"", "1", "x.prefix", "-1.prefix", "1.prefix.0", "1.drop", "1.nothing", "1.mix.zz", "1.drop.1.2", "1.prefix>"} {
		if p, err := ParsePath(bad); err == nil {
			t.Errorf("%q was read as %s", bad, p)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("1234.prefix>17.drop.3>5.mix.9f3a1b")
	f.Fuzz(func(t *testing.T, text string) {
		p, err := ParsePath(text)
		if err != nil {
			return
		}
		again, err := ParsePath(p.String())
		if err != nil || fmt.Sprint(again) != fmt.Sprint(p) {
			t.Errorf("%q is %s, which is %v, %v", text, p, again, err)
		}
	})
}
