package published

import (
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestSpread(t *testing.T) {
	for _, c := range []struct {
		values []float64
		want   Spread
	}{
		{[]float64{7}, Spread{7, 7, 7}},
		{[]float64{4, 1, 3, 2}, Spread{1.75, 2.5, 3.25}}, // as R's quantile and NumPy's
		{[]float64{5, 1, 4, 2, 3}, Spread{2, 3, 4}},
	} {
		if got := SpreadOf(c.values); got != c.want {
			t.Errorf("SpreadOf(%v) = %v, want %v", c.values, got, c.want)
		}
	}
	if got := SpreadOf(nil); !math.IsNaN(got.Median) {
		t.Errorf("spread of nothing: %v", got)
	}
}

// TestInsert: the table of a report is replaced in its place, that of another one is left alone.
func TestInsert(t *testing.T) {
	file := filepath.Join(t.TempDir(), "doc.md")
	begin, end := markers("one.json")
	otherBegin, otherEnd := markers("other.json")
	before := "# Title\n\n" + begin + "old\n" + end + "\ntext\n\n" + otherBegin + "kept\n" + otherEnd
	if err := os.WriteFile(file, []byte(before), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"one.json", "two.json"} {
		if err := Insert(file, name, "new "+name+"\n"); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"one.json": "new one.json\n", "two.json": "new two.json\n", "other.json": "kept\n"} {
		if got, ok := TableIn(text, name); !ok || string(got) != want {
			t.Errorf("%s: %v, %q", name, ok, got)
		}
	}
	if !strings.Contains(string(text), "\ntext\n") || strings.Contains(string(text), "old") {
		t.Errorf("%s", text)
	}
}
