// select.h - selecting and sorting candidates of a draw.
#pragma once
#include <cstdint>

namespace KV_NS {

struct Candidate {
    float logit, weight;
    int32_t id;
};

// The k-th largest of a[n], 1 <= k <= n, none of them NaN; reorders a (Hoare, 1961).
static float kth_largest(float *a, int n, int k) {
    int low = 0, high = n - 1;
    const int want = k - 1;
    while (low < high) {
        const float x = a[low], y = a[low + (high - low) / 2], z = a[high];
        const float pivot = x < y ? (y < z ? y : x < z ? z : x) : (x < z ? x : y < z ? z : y);
        int i = low, j = high;
        while (i <= j) {
            while (a[i] > pivot) i++;
            while (a[j] < pivot) j--;
            if (i <= j) {
                const float t = a[i];
                a[i++] = a[j];
                a[j--] = t;
            }
        }
        if (want <= j) high = j;
        else if (want >= i) low = i;
        else break;
    }
    return a[want];
}

// Quicksort, insertion sort for short pieces; recurses into the shorter half.
template <class Before> static void sort(Candidate *a, int n, Before before) {
    while (n > 16) {
        const Candidate x = a[0], y = a[n / 2], z = a[n - 1];
        const Candidate pivot = before(x, y) ? (before(y, z) ? y : before(x, z) ? z : x)
                                             : (before(x, z) ? x : before(y, z) ? z : y);
        int i = 0, j = n - 1;
        while (i <= j) {
            while (before(a[i], pivot)) i++;
            while (before(pivot, a[j])) j--;
            if (i <= j) {
                const Candidate t = a[i];
                a[i++] = a[j];
                a[j--] = t;
            }
        }
        if (j + 1 < n - i) {
            sort(a, j + 1, before);
            a += i, n -= i;
        } else {
            sort(a + i, n - i, before);
            n = j + 1;
        }
    }
    for (int i = 1; i < n; i++) {
        const Candidate t = a[i];
        int j = i;
        for (; j > 0 && before(t, a[j - 1]); j--) a[j] = a[j - 1];
        a[j] = t;
    }
}

static void sort_by_logit(Candidate *a, int n) {
    sort(a, n, [](const Candidate &x, const Candidate &y) { return x.logit > y.logit || (x.logit == y.logit && x.id < y.id); });
}
static void sort_by_id(Candidate *a, int n) {
    sort(a, n, [](const Candidate &x, const Candidate &y) { return x.id < y.id; });
}

}  // namespace KV_NS
